"""What runs after compilation: prepared weights and the observation of densities."""
