"""A serving engine in virtual time that runs the same planner as the real engine."""
