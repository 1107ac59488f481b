"""Ray wrappers of the federated core: the job's coordinator and its workers."""
