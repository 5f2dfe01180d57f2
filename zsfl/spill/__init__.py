"""The gradient files: layout, atomic write, index, release."""
