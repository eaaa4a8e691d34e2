"""DistilBERT's objective in Hugging Face's Trainer: half of a BERT, on the lines of a file.

    python examples/trainer.py bert-base-uncased notes.txt --out small

The models, the data and the loop are transformers'; the loss makes no (tokens, vocabulary) tensor. Wants the packages
transformers, datasets and accelerate.
"""

import argparse

from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    TrainingArguments,
)

from fastdistil import DistilTrainer

parser = argparse.ArgumentParser()
parser.add_argument("teacher", help="a BERT with a masked-LM head: a folder, or a name on the hub")
parser.add_argument("text", help="a file with a text a line")
parser.add_argument("--out", default="small")
parser.add_argument("--steps", type=int, default=1000)
words = parser.parse_args()

# The student is every other layer of the teacher, with its embeddings and its head.
tokenizer = AutoTokenizer.from_pretrained(words.teacher)
teacher = AutoModelForMaskedLM.from_pretrained(words.teacher)
num_layers = teacher.config.num_hidden_layers
student = AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(words.teacher, num_hidden_layers=num_layers // 2))
student.bert.embeddings.load_state_dict(teacher.bert.embeddings.state_dict())
student.cls.load_state_dict(teacher.cls.state_dict())
for i, layer in enumerate(student.bert.encoder.layer):
    layer.load_state_dict(teacher.bert.encoder.layer[2 * i].state_dict())

data = load_dataset("text", data_files=words.text, split="train")
data = data.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=128), batched=True)

# These are the five lines that distil.
args = TrainingArguments(
    words.out, max_steps=words.steps, learning_rate=5e-4, logging_steps=max(1, words.steps // 10), report_to="none"
)
collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
trainer = DistilTrainer(student, args, teacher=teacher, train_dataset=data, data_collator=collator)
trainer.train()
trainer.save_model()

tokenizer.save_pretrained(words.out)
print(f"{words.out}: {student.num_parameters():,} of {teacher.num_parameters():,} parameters")
