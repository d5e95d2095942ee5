//! The commands: one file each, each the story of its command.
