"""Where images come from: official archives, folders, scikit-learn's digits, a procedural set."""
