"""What FedTrans is compared with: methods that fit one job's model to unequal devices.

All train multilayer perceptrons on the federated core and are given the largest model that FedTrans
produced as their full model (the paper's rule).
"""
