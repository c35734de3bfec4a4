"""Teacher to student: prune a teacher to a phone-sized shape, then train it against the teacher's logits."""
