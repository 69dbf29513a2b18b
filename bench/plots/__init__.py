"""One module for each topic that plot.py draws."""
