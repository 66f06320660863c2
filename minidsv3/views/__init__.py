"""Figures (matplotlib) and interactive views (ipywidgets). This floor imports the rest; nothing imports it but notebooks."""
