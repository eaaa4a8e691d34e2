"""What a student keeps: tasks, fine-tuning by transformers, scores, tables and plots."""
