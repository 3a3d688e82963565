//! The privileged suites: a `World` that cleans up after itself, and the cases run in it.
