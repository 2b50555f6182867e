"""What a method is measured against and shown with: baselines, protocols, figures, the report."""
