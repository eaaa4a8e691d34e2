"""What every command stands on: configuration, ranks, the run folder, checkpoints, metrics, profiles."""
