"""Swan: a training engine that picks, and changes while it runs, the cores that it trains on.

Source: Singapuram, Lai, Hu, Chowdhury, "Swan: A Neural Engine for Efficient DNN Training on
Smartphone SoCs", 2022, arXiv 2206.04687. Pure: time, energy and pressure come in as numbers.
"""
