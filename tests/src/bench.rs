//! Figures.
pub mod instructions;
