//! The threads that compute: a few that wait for work together, start it together and end it together.
//!
//! A step of a small batch takes less than a millisecond, so who waits looks for work for some microseconds before it
//! sleeps: between the steps of one batch nobody sleeps, between requests nobody computes.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a waiting thread looks for work before it sleeps.
const LOOK_MAX: Duration = Duration::from_micros(50);

/// The threads that this process may use: the processors of its affinity mask or the quota of its control group (version 1
/// or 2), whichever is less.
pub fn threads_available() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

type Work = Arc<dyn Fn(usize) + Send + Sync>;

/// The caller of [`Threads::run`] and a number of threads that end when this is dropped.
pub(super) struct Threads {
    shared: Arc<Shared>,
    handles: Vec<std::thread::JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    /// How many pieces of work were given out. Changed under the lock of `work`.
    given: AtomicUsize,
    work: Mutex<Given>,
    woken: Condvar,
    /// How many of the current work's members are not done.
    open: AtomicUsize,
    panicked: AtomicBool,
    done_lock: Mutex<()>,
    done: Condvar,
}

#[derive(Default)]
struct Given {
    work: Option<Work>,
    members: usize,
    stop: bool,
}

impl Threads {
    /// `count` threads in all, at least one.
    pub(super) fn new(count: usize) -> Self {
        let shared = Arc::new(Shared::default());
        let handles = (1..count.max(1))
            .filter_map(|member| {
                let shared = shared.clone();
                let builder = std::thread::Builder::new().name(format!("compute-{member}"));
                builder.spawn(move || shared.serve(member)).ok()
            })
            .collect();
        Self { shared, handles }
    }

    pub(super) fn count(&self) -> usize {
        self.handles.len() + 1
    }

    /// Calls `work` with 0 to `members - 1`, each on a thread of its own and at the same time, and waits for all.
    ///
    /// # Panics
    /// Where one of them did, or there are fewer threads than members.
    pub(super) fn run(&mut self, members: usize, work: impl Fn(usize) + Send + Sync + 'static) {
        assert!((1..=self.count()).contains(&members));
        if members == 1 {
            return work(0);
        }
        let work: Work = Arc::new(work);
        let shared = &self.shared;
        shared.open.store(members - 1, Ordering::Relaxed);
        {
            let mut given = lock(&shared.work);
            given.work = Some(work.clone());
            given.members = members;
            shared.given.fetch_add(1, Ordering::Release);
        }
        shared.woken.notify_all();
        let own = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(0)));
        shared.wait_until_done();
        lock(&shared.work).work = None;
        let others = shared.panicked.swap(false, Ordering::Relaxed);
        if let Err(panic) = own {
            std::panic::resume_unwind(panic);
        }
        assert!(!others, "a computing thread panicked");
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        lock(&self.shared.work).stop = true;
        self.shared.given.fetch_add(1, Ordering::Release);
        self.shared.woken.notify_all();
        for handle in self.handles.drain(..) {
            let _ = handle.join();
        }
    }
}

impl Shared {
    fn serve(&self, member: usize) {
        let mut seen = 0;
        loop {
            look(|| self.given.load(Ordering::Acquire) != seen);
            let work = {
                let mut given = lock(&self.work);
                while self.given.load(Ordering::Relaxed) == seen && !given.stop {
                    given = self
                        .woken
                        .wait(given)
                        .unwrap_or_else(PoisonError::into_inner);
                }
                if given.stop {
                    return;
                }
                seen = self.given.load(Ordering::Relaxed);
                given.work.clone().filter(|_| member < given.members)
            };
            let Some(work) = work else { continue };
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(member)));
            if result.is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
            drop(work);
            if self.open.fetch_sub(1, Ordering::AcqRel) == 1 {
                // With the lock, so that this cannot fall between the look and the sleep of who waits.
                drop(lock(&self.done_lock));
                self.done.notify_all();
            }
        }
    }

    fn wait_until_done(&self) {
        if look(|| self.open.load(Ordering::Acquire) == 0) {
            return;
        }
        let mut guard = lock(&self.done_lock);
        while self.open.load(Ordering::Acquire) != 0 {
            guard = self
                .done
                .wait(guard)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Whether `found` came true before it was time to sleep.
fn look(found: impl Fn() -> bool) -> bool {
    let started = Instant::now();
    loop {
        for _ in 0..64 {
            if found() {
                return true;
            }
            std::hint::spin_loop();
        }
        if started.elapsed() > LOOK_MAX {
            return false;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where the members of one piece of work wait for each other.
pub(super) struct Barrier {
    members: usize,
    arrived: AtomicUsize,
    turn: AtomicUsize,
    broken: AtomicBool,
    lock: Mutex<()>,
    turned: Condvar,
}

impl Barrier {
    pub(super) fn new(members: usize) -> Self {
        Self {
            members,
            arrived: AtomicUsize::new(0),
            turn: AtomicUsize::new(0),
            broken: AtomicBool::new(false),
            lock: Mutex::new(()),
            turned: Condvar::new(),
        }
    }

    /// Returns when all members have called it as often as this one.
    ///
    /// # Panics
    /// Where another member gave up, see [`Barrier::guard`].
    pub(super) fn wait(&self) {
        let turn = self.turn.load(Ordering::Acquire);
        if self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == self.members {
            self.arrived.store(0, Ordering::Relaxed);
            self.turn.store(turn.wrapping_add(1), Ordering::Release);
            drop(lock(&self.lock));
            self.turned.notify_all();
            return;
        }
        let over =
            || self.turn.load(Ordering::Acquire) != turn || self.broken.load(Ordering::Acquire);
        if !look(over) {
            let mut guard = lock(&self.lock);
            while !over() {
                guard = self
                    .turned
                    .wait(guard)
                    .unwrap_or_else(PoisonError::into_inner);
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
    fn all_members_run_at_the_same_time_and_meet_at_the_barrier() {
        let mut threads = Threads::new(4);
        for members in [1, 4, 2, 3, 4] {
            let sums = Arc::new((0..100).map(|_| AtomicUsize::new(0)).collect::<Vec<_>>());
            let (barrier, seen) = (Barrier::new(members), sums.clone());
            threads.run(members, move |member| {
                let _guard = barrier.guard();
                for sum in seen.iter() {
                    sum.fetch_add(1 << member, Ordering::Relaxed);
                    barrier.wait();
                    assert_eq!(sum.load(Ordering::Relaxed), (1 << members) - 1);
                }
            });
        }
    }

    #[test]
    fn a_panic_of_one_member_is_a_panic_of_all_and_the_threads_go_on() {
        let mut threads = Threads::new(3);
        for bad in 0..3 {
            let barrier = Barrier::new(3);
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                threads.run(3, move |member| {
                    let _guard = barrier.guard();
                    barrier.wait();
                    assert!(member != bad, "as expected");
                    barrier.wait();
                });
            }));
            assert!(result.is_err());
        }
        let count = Arc::new(AtomicUsize::new(0));
        let seen = count.clone();
        threads.run(3, move |_| {
            seen.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.load(Ordering::Relaxed), 3);
    }
}
