"""What text needs before it reaches a model, and after it leaves one."""
