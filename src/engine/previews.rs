//! Pictures on their way, for readers that show them: the latest of each digit, and no other.
//!
//! The batcher never waits for a reader: what a slow one has not fetched is overwritten by the next step, so a request
//! holds one picture at most of each of its digits in the batch. Who makes an animation asks for every picture instead,
//! and bounds how many that are.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// What a digit is heading for, after one of its steps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Preview {
    /// The digit's place in the request.
    pub index: usize,
    /// Steps taken, from 1; the last step has no preview, but the digit.
    pub step: usize,
    pub steps: usize,
    /// The estimate of the finished digit, height x width x channels.
    pub pixels: Vec<u8>,
}

#[derive(Debug, Default)]
pub(super) struct Previews {
    /// By digit and, where every picture is kept, by step.
    latest: Mutex<BTreeMap<(usize, usize), Preview>>,
    changed: Notify,
    /// Nothing is overwritten or removed.
    pub(super) every: bool,
}

impl Previews {
    pub(super) fn every() -> Self {
        Self {
            every: true,
            ..Self::default()
        }
    }

    pub(super) fn put(&self, preview: Preview) {
        let step = if self.every { preview.step } else { 0 };
        self.lock().insert((preview.index, step), preview);
        self.changed.notify_one();
    }

    /// Takes out what a digit had, now that it is done.
    pub(super) fn remove(&self, index: usize) {
        if !self.every {
            self.lock().remove(&(index, 0));
        }
    }

    /// Of the digit that is furthest ahead in the request.
    pub(super) fn take(&self) -> Option<Preview> {
        self.lock().pop_first().map(|(_, preview)| preview)
    }

    /// Until there may be something to take.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<(usize, usize), Preview>> {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
