//! The service as a process of its own.

use image_generator::client::{Client, ClientConfig};
use serde_json::Value;
use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Longest wait for anything that a test waits for.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The binary with an empty environment but for what a process needs.
pub fn binary() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_image-generator"));
    command.env_clear();
    command.envs(std::env::var("PATH").map(|p| ("PATH", p)));
    command.env("HOST", "127.0.0.1").env("PORT", "0");
    command
}

/// A running service, killed when it is dropped.
pub struct App {
    process: Child,
    pub address: SocketAddr,
    pub client: Client,
    log: Arc<Mutex<Vec<Value>>>,
}

impl App {
    /// Starts the service and waits for its first log line, which says where it listens.
    pub fn start<N: AsRef<OsStr>, V: AsRef<OsStr>>(env: &[(N, V)]) -> Self {
        Self::start_by(&[], env)
    }

    /// The same by way of a command that is given the binary's path as its last argument, and becomes it.
    pub fn start_by<N: AsRef<OsStr>, V: AsRef<OsStr>>(by: &[&str], env: &[(N, V)]) -> Self {
        let mut command = binary();
        if let [program, args @ ..] = by {
            let vars: Vec<_> = command
                .get_envs()
                .filter_map(|(n, v)| Some((n.to_owned(), v?.to_owned())))
                .collect();
            let path = command.get_program().to_owned();
            command = Command::new(program);
            command.args(args).arg(path).env_clear().envs(vars);
        }
        command.envs(env.iter().map(|(n, v)| (n.as_ref(), v.as_ref())));
        let mut process = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let first: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        let address: SocketAddr = first["address"].as_str().unwrap().parse().unwrap();
        let log = Arc::new(Mutex::new(vec![first]));
        let sink = log.clone();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let entry = serde_json::from_str(&line).unwrap_or(Value::String(line));
                sink.lock().unwrap().push(entry);
            }
        });
        let client = Client::new(&format!("http://{address}"), ClientConfig::default()).unwrap();
        Self {
            process,
            address,
            client,
            log,
        }
    }

    /// The process's id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Watches the resident memory until it is told to stop.
    pub fn peak_memory(&self) -> PeakMemory {
        let path = format!("/proc/{}/statm", self.process.id());
        let (stop, stopped) = std::sync::mpsc::channel();
        let watch = std::thread::spawn(move || {
            let mut peak = 0;
            while stopped.recv_timeout(Duration::from_millis(2)).is_err() {
                let text = std::fs::read_to_string(&path).unwrap_or_default();
                let pages = text.split(' ').nth(1).and_then(|n| n.parse::<u64>().ok());
                peak = peak.max(pages.unwrap_or_default() * 4096);
            }
            peak
        });
        PeakMemory { stop, watch }
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// Waits until a log line has what is asked for.
    pub async fn logged(&self, wanted: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(found) = self.log.lock().unwrap().iter().find(|l| wanted(l)) {
                return found.clone();
            }
            assert!(Instant::now() < deadline, "not logged: {:#?}", self.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub fn log(&self) -> Vec<Value> {
        self.log.lock().unwrap().clone()
    }

    /// Sends a signal, by its name.
    pub fn signal(&self, name: &str) {
        let id = self.process.id().to_string();
        let status = Command::new("kill").args(["-s", name, &id]).status();
        assert!(status.unwrap().success());
    }

    /// Waits for the end of the process.
    pub async fn ended(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the process goes on");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

pub struct PeakMemory {
    stop: std::sync::mpsc::Sender<()>,
    watch: std::thread::JoinHandle<u64>,
}

impl PeakMemory {
    /// The highest value that was seen, in bytes.
    pub fn stop(self) -> u64 {
        self.stop.send(()).unwrap();
        self.watch.join().unwrap()
    }
}

impl Drop for App {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Width, height and pixels of an 8-bit grey PNG, read by the `png` crate.
pub fn grey(bytes: &[u8]) -> (usize, usize, Vec<u8>) {
    let mut reader = png::Decoder::new(std::io::Cursor::new(bytes))
        .read_info()
        .unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut pixels).unwrap();
    assert_eq!(info.color_type, png::ColorType::Grayscale);
    assert_eq!(info.bit_depth, png::BitDepth::Eight);
    (info.width as usize, info.height as usize, pixels)
}
