"""Model backends behind small protocols; see `stages.models.backends`."""
