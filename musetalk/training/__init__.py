"""What the trainers share: runs, states, checkpoints, logs and validation."""
