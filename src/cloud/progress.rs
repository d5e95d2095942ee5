//! What an operator sees while the cloud works: a bar on a terminal, a line for each step elsewhere. Always on stderr,
//! since stdout is for results.

use std::io::{self, Write};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Where progress is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// On stderr.
    Shown,
    /// Nowhere.
    Hidden,
}

impl Progress {
    /// Begins a piece of work of so many steps.
    #[must_use]
    pub fn begin(self, title: &'static str, steps: usize) -> Work {
        let shown = self == Self::Shown && steps > 0;
        // Hidden where stderr is no terminal that can move its cursor: lines are for that.
        let bar = shown.then(|| bar(title, steps)).filter(|bar| !bar.is_hidden());
        let lines = shown && bar.is_none();
        Work { title, steps, done: 0, bar, lines }
    }
}

/// A piece of work under way.
#[derive(Debug)]
pub struct Work {
    title: &'static str,
    steps: usize,
    done: usize,
    bar: Option<ProgressBar>,
    lines: bool,
}

impl Work {
    /// One more step is done.
    pub fn step(&mut self, what: &str) {
        self.done += 1;
        if let Some(bar) = &self.bar {
            bar.set_message(what.to_owned());
            bar.inc(1);
        }
        if self.lines {
            // Progress that nobody can read is no reason to stop.
            let _ = writeln!(io::stderr(), "{} {}/{}: {what}", self.title, self.done, self.steps);
        }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn bar(title: &'static str, steps: usize) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(steps as u64), ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template("{prefix} [{bar:24}] {pos}/{len} {msg}") {
        bar.set_style(style);
    }
    bar.set_prefix(title);
    bar
}
