"""fastdistil: DistilBERT-style distillation of BERT-like encoders during pre-training.

Importing the package imports nothing heavy: `--help` and configuration errors must come before torch does.
"""

__version__ = "0.1.0"
