"""Self-supervised methods: targets, losses, the student-teacher pair, parameter groups."""
