"""What a phone can hold: device profiles, memory prediction, and the budget check."""
