"""The report: its data, its charts and its pages."""
