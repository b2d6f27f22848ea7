"""What the loss costs beside what a user would take instead: shapes, peers, measures, tables, plots, comparisons."""
