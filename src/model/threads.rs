//! The threads that compute: a few that wait for work and do it together with whoever has it.
//!
//! A step of a small batch takes less than a millisecond, so who waits looks for work for some microseconds before it
//! sleeps: between the steps of one batch nobody sleeps, between requests nobody computes. And nobody depends on a thread
//! that the system has not woken yet: on a busy machine that takes longer than the work.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a waiting thread looks for work before it sleeps.
const LOOK_MAX: Duration = Duration::from_micros(50);
/// How long threads may take to join before the others begin without them.
const JOIN_MAX: Duration = Duration::from_micros(30);

/// The threads that this process may use: the processors of its affinity mask or the quota of its control group (version 1
/// or 2), whichever is less.
pub fn threads_available() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Called with a member's number, from 0, and how many there are.
type Work = Arc<dyn Fn(usize, usize) + Send + Sync>;

/// The caller and a number of threads that end when this is dropped.
pub(super) struct Threads {
    shared: Arc<Shared>,
    handles: Vec<std::thread::JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    /// How many pieces of work were given out. Changed under the lock of `given`, as is `joined`.
    turn: AtomicUsize,
    /// Threads that do the current work beside the caller.
    joined: AtomicUsize,
    given: Mutex<Given>,
    woken: Condvar,
    /// How many members do the current work; 0 until that is known.
    members: AtomicUsize,
    /// How many of those that joined are done.
    done: AtomicUsize,
    done_lock: Mutex<()>,
    all_done: Condvar,
    panicked: AtomicBool,
}

#[derive(Default)]
struct Given {
    /// None: nobody may join any more.
    work: Option<Work>,
    joined_max: usize,
    stop: bool,
}

impl Threads {
    /// `count` threads in all, at least one.
    pub(super) fn new(count: usize) -> Self {
        let shared = Arc::new(Shared::default());
        let handles = (1..count.max(1))
            .filter_map(|i| {
                let shared = shared.clone();
                let builder = std::thread::Builder::new().name(format!("compute-{i}"));
                builder.spawn(move || shared.serve()).ok()
            })
            .collect();
        Self { shared, handles }
    }

    pub(super) fn count(&self) -> usize {
        self.handles.len() + 1
    }

    /// Does work that is divided beforehand: `work` is called once for each of at most `members_max` members, all at the
    /// same time, with its number and how many there are. Waits for all of them.
    ///
    /// # Panics
    /// Where one of them did.
    pub(super) fn together(
        &mut self,
        members_max: usize,
        work: impl Fn(usize, usize) + Send + Sync + 'static,
    ) {
        let (shared, joined_max) = (&self.shared, self.joined_max(members_max));
        let work = shared.give(Arc::new(work), joined_max);
        look(JOIN_MAX, || {
            shared.joined.load(Ordering::Acquire) == joined_max
        });
        let joined = shared.close();
        shared.members.store(joined + 1, Ordering::Release);
        shared.finish(|| work(0, joined + 1));
    }

    /// Does work of which each member takes the next piece by itself: `work` returns when there is none left. Threads join as
    /// soon as they can, up to `members_max` with the caller. Waits for all that did.
    ///
    /// # Panics
    /// Where one of them did.
    pub(super) fn apart(
        &mut self,
        members_max: usize,
        work: impl Fn(usize) + Send + Sync + 'static,
    ) {
        let (shared, joined_max) = (&self.shared, self.joined_max(members_max));
        let work = shared.give(Arc::new(move |member, _| work(member)), joined_max);
        shared.members.store(usize::MAX, Ordering::Release);
        shared.finish(|| work(0, usize::MAX));
    }

    fn joined_max(&self, members_max: usize) -> usize {
        members_max.saturating_sub(1).min(self.handles.len())
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        lock(&self.shared.given).stop = true;
        self.shared.turn.fetch_add(1, Ordering::Release);
        self.shared.woken.notify_all();
        for handle in self.handles.drain(..) {
            let _ = handle.join();
        }
    }
}

impl Shared {
    fn give(&self, work: Work, joined_max: usize) -> Work {
        self.members.store(0, Ordering::Relaxed);
        self.done.store(0, Ordering::Relaxed);
        let mut given = lock(&self.given);
        self.joined.store(0, Ordering::Relaxed);
        if joined_max > 0 {
            given.work = Some(work.clone());
            given.joined_max = joined_max;
            self.turn.fetch_add(1, Ordering::Release);
            drop(given);
            self.woken.notify_all();
        }
        work
    }

    /// Lets nobody join any more, and says how many did.
    fn close(&self) -> usize {
        lock(&self.given).work = None;
        self.joined.load(Ordering::Acquire)
    }

    /// Does the caller's own part and waits for the others.
    fn finish(&self, own: impl FnOnce()) {
        let own = std::panic::catch_unwind(std::panic::AssertUnwindSafe(own));
        let joined = self.close();
        let done = || self.done.load(Ordering::Acquire) == joined;
        if !look(LOOK_MAX, done) {
            let mut guard = lock(&self.done_lock);
            while !done() {
                guard = wait(&self.all_done, guard);
            }
        }
        let others = self.panicked.swap(false, Ordering::Relaxed);
        if let Err(panic) = own {
            std::panic::resume_unwind(panic);
        }
        assert!(!others, "a computing thread panicked");
    }

    fn serve(&self) {
        let mut seen = 0;
        loop {
            look(LOOK_MAX, || self.turn.load(Ordering::Acquire) != seen);
            let (work, member) = {
                let mut given = lock(&self.given);
                while self.turn.load(Ordering::Relaxed) == seen && !given.stop {
                    given = wait(&self.woken, given);
                }
                if given.stop {
                    return;
                }
                seen = self.turn.load(Ordering::Relaxed);
                let joined = self.joined.load(Ordering::Relaxed);
                match &given.work {
                    Some(work) if joined < given.joined_max => {
                        self.joined.store(joined + 1, Ordering::Release);
                        (work.clone(), joined + 1)
                    }
                    _ => continue,
                }
            };
            // Soon: the caller waits for joiners no longer than `JOIN_MAX`.
            while self.members.load(Ordering::Acquire) == 0 {
                if !look(LOOK_MAX, || self.members.load(Ordering::Acquire) != 0) {
                    std::thread::yield_now();
                }
            }
            let members = self.members.load(Ordering::Acquire);
            let run = std::panic::AssertUnwindSafe(|| work(member, members));
            if std::panic::catch_unwind(run).is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
            drop(work);
            self.done.fetch_add(1, Ordering::AcqRel);
            // With the lock, so that this cannot fall between the look and the sleep of who waits.
            drop(lock(&self.done_lock));
            self.all_done.notify_all();
        }
    }
}

/// Whether `found` came true before it was time to sleep.
fn look(look_max: Duration, found: impl Fn() -> bool) -> bool {
    let started = Instant::now();
    loop {
        for _ in 0..64 {
            if found() {
                return true;
            }
            std::hint::spin_loop();
        }
        if started.elapsed() > look_max {
            return false;
        }
    }
}

fn wait<'a, T>(condition: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condition
        .wait(guard)
        .unwrap_or_else(PoisonError::into_inner)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where the members of one piece of work wait for each other.
#[derive(Default)]
pub(super) struct Barrier {
    arrived: AtomicUsize,
    turn: AtomicUsize,
    broken: AtomicBool,
    lock: Mutex<()>,
    turned: Condvar,
}

impl Barrier {
    /// Returns when all `members`, the same number each time, have called it as often as this one.
    ///
    /// # Panics
    /// Where another member gave up, see [`Barrier::guard`].
    pub(super) fn wait(&self, members: usize) {
        let turn = self.turn.load(Ordering::Acquire);
        if self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == members {
            self.arrived.store(0, Ordering::Relaxed);
            self.turn.store(turn.wrapping_add(1), Ordering::Release);
            drop(lock(&self.lock));
            self.turned.notify_all();
            return;
        }
        let over =
            || self.turn.load(Ordering::Acquire) != turn || self.broken.load(Ordering::Acquire);
        if !look(LOOK_MAX, over) {
            let mut guard = lock(&self.lock);
            while !over() {
                guard = wait(&self.turned, guard);
            }
        }
        assert!(
            !self.broken.load(Ordering::Acquire),
            "another computing thread panicked"
        );
    }

    /// To be held while a member works: if it panics, the others do not wait for it for ever.
    pub(super) fn guard(&self) -> impl Drop + '_ {
        struct Guard<'a>(&'a Barrier);
        impl Drop for Guard<'_> {
            fn drop(&mut self) {
                if std::thread::panicking() {
                    self.0.broken.store(true, Ordering::Release);
                    drop(lock(&self.0.lock));
                    self.0.turned.notify_all();
                }
            }
        }
        Guard(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_run_at_the_same_time_and_meet_at_the_barrier() {
        let mut threads = Threads::new(4);
        for members_max in (1..=5).cycle().take(40) {
            let sums = Arc::new((0..50).map(|_| AtomicUsize::new(0)).collect::<Vec<_>>());
            let (barrier, seen) = (Barrier::default(), sums.clone());
            threads.together(members_max, move |member, members| {
                assert!(member < members && members <= members_max.min(4));
                let _guard = barrier.guard();
                for sum in seen.iter() {
                    sum.fetch_add(1 << member, Ordering::Relaxed);
                    barrier.wait(members);
                    assert_eq!(sum.load(Ordering::Relaxed), (1 << members) - 1);
                }
            });
            assert!(sums.iter().all(|s| s.load(Ordering::Relaxed) > 0));
        }
    }

    #[test]
    fn every_piece_is_done_once_whoever_joins() {
        let mut threads = Threads::new(3);
        for pieces in (0..20).cycle().take(200) {
            let done = Arc::new((0..pieces).map(|_| AtomicUsize::new(0)).collect::<Vec<_>>());
            let (next, seen) = (AtomicUsize::new(0), done.clone());
            threads.apart(3, move |member| {
                assert!(member < 3);
                while let Some(piece) = seen.get(next.fetch_add(1, Ordering::Relaxed)) {
                    piece.fetch_add(1, Ordering::Relaxed);
                }
            });
            assert!(done.iter().all(|d| d.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    fn a_panic_of_one_member_is_a_panic_of_all_and_the_threads_go_on() {
        let mut threads = Threads::new(3);
        for _ in 0..20 {
            let barrier = Barrier::default();
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                threads.together(3, move |member, members| {
                    let _guard = barrier.guard();
                    barrier.wait(members);
                    assert!(member + 1 != members, "as expected");
                    barrier.wait(members);
                });
            }));
            assert!(result.is_err());
        }
        let count = Arc::new(AtomicUsize::new(0));
        let seen = count.clone();
        threads.apart(1, move |_| {
            seen.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.load(Ordering::Relaxed), 1);
    }
}
