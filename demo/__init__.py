"""The small model that comes with the pack, and the world that it draws."""
