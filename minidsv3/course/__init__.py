"""What the notebooks share: checks, predictions and exercises."""
