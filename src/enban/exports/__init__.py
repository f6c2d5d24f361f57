"""How others reach a disk."""
