"""``personmae visualise``: pictures that explain what a model sees and finds, as PNGs and one HTML page."""
