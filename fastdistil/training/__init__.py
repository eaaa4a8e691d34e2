"""What a distillation is made of: checks beforehand, objective, teacher, engine, memory, the loop."""
