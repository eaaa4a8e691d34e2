"""The encoder and its masked-LM head: sizes, Hugging Face names, modules, weights in and out."""
