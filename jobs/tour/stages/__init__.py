"""The tour's stages, one module a system; each defines ``STAGE``."""
