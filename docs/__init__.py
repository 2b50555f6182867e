"""The pages and the programs that build them: annotate.py (site), architecture.py (figures)."""
