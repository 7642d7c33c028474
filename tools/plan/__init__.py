"""Measures on this machine what trainings will cost, and says what they would refuse (`musetalk_trainer.py plan`)."""
