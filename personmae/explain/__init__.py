"""Pictures that explain a model: matched patches, attention, and hidden patches predicted."""
