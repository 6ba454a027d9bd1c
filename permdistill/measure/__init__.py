"""What a judge or a student is worth: records of any tool, metrics, reports. Gold answers are read here alone."""
