"""Creates the small weights in models/mini (`python -m tools.make_mini`)."""
