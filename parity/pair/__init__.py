"""What is compared: two specs, rules and inputs."""
