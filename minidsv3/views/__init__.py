"""Figures (matplotlib) and interactive views (ipywidgets). This floor imports the rest; only notebooks import it."""
