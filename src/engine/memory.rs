//! How much memory there is, how much is taken, and who has been promised how much.

use super::LoadError;
use std::fs;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::Notify;

const MB: u64 = 1 << 20;
/// Kept free of weights, for connections and the numbers between two layers; less where there is little memory.
const HEADROOM_BYTES: u64 = 16 << 20;

/// A limit on the process's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    pub limit_bytes: u64,
    /// What sets it, for messages.
    pub limit_from: &'static str,
}

impl Memory {
    /// The tightest of MAX_MEMORY_MB and the container's limit; none: no limit is known.
    pub fn limit(configured: Option<u64>) -> Option<Self> {
        let configured = configured.map(|limit_bytes| Self {
            limit_bytes,
            limit_from: "MAX_MEMORY_MB",
        });
        let container = cgroup_limit().map(|limit_bytes| Self {
            limit_bytes,
            limit_from: "the container's limit",
        });
        [configured, container]
            .into_iter()
            .flatten()
            .min_by_key(|m| m.limit_bytes)
    }

    /// Resident bytes of this process; 0 where the system does not say.
    pub fn resident_bytes() -> u64 {
        let pages = fs::read_to_string("/proc/self/statm")
            .ok()
            .and_then(|s| s.split(' ').nth(1)?.parse::<u64>().ok());
        pages.unwrap_or(0) * 4096
    }
}

/// Memory promised to models that are loaded, or being loaded.
#[derive(Debug)]
pub(super) struct Budget {
    limit: Option<Memory>,
    promises: Mutex<Promises>,
    /// Told when a promise was given back, or a model fell idle.
    changed: Notify,
}

#[derive(Debug, Default)]
struct Promises {
    bytes: u64,
    /// Of them, those that have been taken up: they are part of what the process takes.
    settled: u64,
}

/// A model's share, given back when it is dropped.
#[derive(Debug)]
pub(super) struct Reservation {
    budget: Arc<Budget>,
    bytes: u64,
    settled: bool,
}

impl Budget {
    pub(super) fn new(limit: Option<Memory>) -> Self {
        Self {
            limit,
            promises: Mutex::default(),
            changed: Notify::new(),
        }
    }

    /// Promises `bytes`, if they fit beside what was promised before and what the process takes otherwise; none: not now.
    ///
    /// # Errors
    /// [`LoadError::TooLarge`] if they would not fit even if everything else was given back.
    pub(super) fn reserve(
        self: &Arc<Self>,
        bytes: u64,
        resident_bytes: u64,
    ) -> Result<Option<Reservation>, LoadError> {
        let mut promises = self.promises();
        if let Some(limit) = self.limit {
            // What the rest of the process takes: at least this, for a promise may be taken up in part; at most that.
            let least = resident_bytes.saturating_sub(promises.bytes);
            let most = resident_bytes.saturating_sub(promises.settled);
            let headroom = HEADROOM_BYTES.min(limit.limit_bytes / 16);
            let room = limit.limit_bytes - headroom;
            if least + bytes > room {
                return Err(LoadError::TooLarge {
                    needed_mb: bytes.div_ceil(MB),
                    used_mb: least.div_ceil(MB),
                    headroom_mb: headroom.div_ceil(MB),
                    limit_mb: limit.limit_bytes / MB,
                    limit_from: limit.limit_from,
                });
            }
            if most + promises.bytes + bytes > room {
                return Ok(None);
            }
        }
        Ok(Some(self.promise(&mut promises, bytes)))
    }

    fn promise(self: &Arc<Self>, promises: &mut Promises, bytes: u64) -> Reservation {
        promises.bytes += bytes;
        Reservation {
            budget: self.clone(),
            bytes,
            settled: false,
        }
    }

    fn promises(&self) -> std::sync::MutexGuard<'_, Promises> {
        self.promises.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Resolves at the next change after this call.
    pub(super) fn changed(&self) -> tokio::sync::futures::Notified<'_> {
        self.changed.notified()
    }

    pub(super) fn wake(&self) {
        self.changed.notify_waiters();
    }
}

impl Reservation {
    /// The model is loaded: its memory is part of what the process takes now.
    pub(super) fn settle(&mut self) {
        if !self.settled {
            self.settled = true;
            self.budget.promises().settled += self.bytes;
            self.budget.wake();
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut promises = self.budget.promises();
        promises.bytes -= self.bytes;
        if self.settled {
            promises.settled -= self.bytes;
        }
        drop(promises);
        self.budget.wake();
    }
}

/// The limit of the innermost control group that has one, version 2 or 1.
fn cgroup_limit() -> Option<u64> {
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    let group = |controller: &str| {
        own.lines()
            .find_map(|l| l.split_once(controller)?.1.strip_prefix(':'))
            .unwrap_or("/")
    };
    let mut limits = Vec::new();
    for (root, path, name) in [
        ("/sys/fs/cgroup", group("0:"), "memory.max"),
        (
            "/sys/fs/cgroup/memory",
            group(":memory"),
            "memory.limit_in_bytes",
        ),
    ] {
        // Inside a container the path may be the host's; its parents up to the root are tried as well.
        for ancestor in std::path::Path::new(path).ancestors() {
            let file = std::path::Path::new(root)
                .join(ancestor.strip_prefix("/").unwrap_or(ancestor))
                .join(name);
            limits.extend(
                fs::read_to_string(file)
                    .ok()
                    .and_then(|text| text.trim().parse::<u64>().ok()),
            );
        }
    }
    // Version 1 writes "no limit" as a number near 2^63.
    limits.into_iter().filter(|&l| l < 1 << 60).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn promises_never_exceed_the_limit() {
        let limit = Memory {
            limit_bytes: 1600 * MB,
            limit_from: "a test",
        };
        let budget = Arc::new(Budget::new(Some(limit)));
        let own = 304 * MB;
        let mut first = budget.reserve(800 * MB, own).unwrap().unwrap();
        // Not taken up yet, taken up, and known to be: the same answer.
        assert!(budget.reserve(640 * MB, own).unwrap().is_none());
        let with_first = own + 800 * MB;
        assert!(budget.reserve(640 * MB, with_first).unwrap().is_none());
        first.settle();
        assert!(budget.reserve(640 * MB, with_first).unwrap().is_none());
        let second = budget.reserve(480 * MB, with_first).unwrap().unwrap();
        assert!(matches!(
            budget.reserve(1281 * MB, with_first + 480 * MB),
            Err(LoadError::TooLarge {
                needed_mb: 1281,
                used_mb: 304,
                headroom_mb: 16,
                limit_mb: 1600,
                ..
            })
        ));
        drop((first, second));
        let promises = budget.promises();
        assert_eq!((promises.bytes, promises.settled), (0, 0));
    }
}
