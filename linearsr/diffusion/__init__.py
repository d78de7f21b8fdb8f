"""The path between picture and noise, its timesteps and solvers, and the experts along it."""
