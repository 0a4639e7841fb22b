"""What flows into the backbone: one folder a field."""
