"""What eval_steering.py measures and shows."""
