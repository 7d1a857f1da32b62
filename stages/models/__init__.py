"""Model backends behind four small protocols; see `stages.models.backends`."""
