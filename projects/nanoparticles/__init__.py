"""From an atomic pair distribution function to the positions of a nanoparticle's atoms."""
