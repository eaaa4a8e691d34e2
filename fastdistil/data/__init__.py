"""Text becomes micro-batches: readers, tokenizer, sequences, shards on disk, the plan of every update, masks."""
