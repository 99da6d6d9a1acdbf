"""One program over many devices and processes: the mesh, what lies where, and experts on it."""
