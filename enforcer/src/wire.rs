//! The shapes of all that is printed or sent.

#[cfg(test)]
mod tests;
