"""Systems together: what none of them can do alone. May import any system; no system imports it."""
