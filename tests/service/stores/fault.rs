//! An object server that does as it is told, its failures included.
//!
//! It serves one object at every path, as S3, GCS and plain file servers do: ranges, ETag, If-Match,
//! If-None-Match. It speaks HTTP/1.1 on bare sockets, because what it must be able to do, no HTTP library lets
//! one do: break off, lie about lengths, fall silent.

use super::Env;
use super::wire::{Exchange, Wire, requested_range};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue};
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::{AbortHandle, JoinSet};

/// Body bytes written at a time.
const PIECE_BYTES: usize = 16 << 10;

/// What happens to one request.
#[derive(Clone, Debug)]
pub enum Fault {
    /// An answer with this status and no object.
    Status(u16),
    /// As `Status`, with Retry-After in seconds.
    Busy { status: u16, retry_after_secs: u64 },
    /// The connection is closed without an answer.
    Hangup,
    /// Neither an answer nor the end of the connection.
    Silence,
    /// So many bytes of the body, then a TCP reset.
    Reset { after: usize },
    /// So many bytes of the body, then nothing more for ever.
    Stall { after: usize },
    /// Content-Length promises the whole body; the connection ends so many bytes before it.
    Short { missing: usize },
    /// A well-formed answer to a range that is so many bytes shorter than what was asked for.
    Less { missing: u64 },
    /// A well-formed answer but for its Content-Range.
    ContentRange(String),
    /// The byte at this place of the object is another one.
    Flip { at: u64 },
    /// 200 and the whole object, whatever range was asked for.
    IgnoreRange,
    /// The object is another one from now on, this answer included.
    Replace(Bytes),
    /// The first byte comes so much later.
    Late(Duration),
    /// No answer before the gate opens.
    Wait(Gate),
}

/// Holds answers back until it is opened.
#[derive(Clone, Debug)]
pub struct Gate(Arc<Semaphore>);

impl Gate {
    pub fn closed() -> Self {
        Self(Arc::new(Semaphore::new(0)))
    }

    pub fn open(&self) {
        self.0.close();
    }

    async fn passed(&self) {
        // Never gets a permit: it returns when the semaphore closes.
        let _ = self.0.acquire().await;
    }
}

/// What a script decides by.
#[derive(Clone, Debug)]
pub struct Request {
    /// 1 for the first request of this script.
    pub n: usize,
    pub path: String,
    pub headers: HeaderMap,
    /// Bytes of the object that are asked for, as far as there are any.
    pub range: Range<u64>,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

type Script = Box<dyn FnMut(&Request) -> Option<Fault> + Send>;

pub struct ObjectServer {
    address: SocketAddr,
    pub wire: Wire,
    shared: Arc<Mutex<Shared>>,
    accept: AbortHandle,
}

struct Shared {
    object: Bytes,
    /// What lies beside the object, by the ending of its path. Nothing else does: asked for, it is not there, which
    /// is neither noted nor a request to the script.
    beside: Vec<(&'static str, Bytes)>,
    /// Counts the objects; ETag, Last-Modified and x-goog-generation follow from it.
    generation: u64,
    ignores_conditions: bool,
    requests: usize,
    script: Script,
}

impl ObjectServer {
    /// Serves an object, without faults, on a free port of the loopback interface.
    pub async fn new(object: impl Into<Bytes>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let wire = Wire::default();
        let shared = Arc::new(Mutex::new(Shared {
            object: object.into(),
            beside: Vec::new(),
            generation: 1,
            ignores_conditions: false,
            requests: 0,
            script: Box::new(|_| None),
        }));
        let (log, state) = (wire.clone(), shared.clone());
        let accept = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((socket, _)) = listener.accept().await {
                connections.spawn(connection(socket, state.clone(), log.clone()));
            }
        });
        Self {
            address,
            wire,
            shared,
            accept: accept.abort_handle(),
        }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}/{path}", self.address)
    }

    /// What the service needs to read the object by plain HTTP.
    pub fn env(&self) -> Env {
        vec![("MODEL_URI", self.url("model.safetensors"))]
    }

    /// Another object takes the place of this one.
    pub fn replace(&self, object: impl Into<Bytes>) {
        self.shared.lock().unwrap().replace(object.into());
    }

    /// Puts a file beside the object, such as its digest: `.sha256`, `.chunks.json` or `/config.json`.
    pub fn put_beside(&self, ending: &'static str, bytes: impl Into<Bytes>) {
        let mut shared = self.shared.lock().unwrap();
        shared.beside.retain(|(e, _)| *e != ending);
        shared.beside.push((ending, bytes.into()));
    }

    /// Takes such a file away again.
    pub fn remove_beside(&self, ending: &str) {
        self.shared
            .lock()
            .unwrap()
            .beside
            .retain(|(e, _)| *e != ending);
    }

    /// If-Match and If-None-Match count for nothing any more, as with some servers.
    pub fn ignore_conditions(&self) {
        self.shared.lock().unwrap().ignores_conditions = true;
    }

    /// Says what happens to each request from now on.
    pub fn script(&self, script: impl FnMut(&Request) -> Option<Fault> + Send + 'static) {
        let mut shared = self.shared.lock().unwrap();
        shared.script = Box::new(script);
        shared.requests = 0;
    }

    /// The same fault for every request from now on.
    pub fn always(&self, fault: Fault) {
        self.script(move |_| Some(fault.clone()));
    }

    /// A fault for the n-th request from now on, 1 being the next.
    pub fn nth(&self, n: usize, fault: Fault) {
        self.script(move |request| (request.n == n).then(|| fault.clone()));
    }

    /// No faults from now on.
    pub fn heal(&self) {
        self.script(|_| None);
    }
}

impl Drop for ObjectServer {
    /// Closes the port and every connection.
    fn drop(&mut self) {
        self.accept.abort();
    }
}

impl Shared {
    fn replace(&mut self, object: Bytes) {
        self.object = object;
        self.generation += 1;
    }

    /// The answer to a request for what may lie beside the object; none: it is for the object.
    fn sibling(&self, path: &str) -> Option<Plan> {
        const ENDINGS: [&str; 3] = [".sha256", ".chunks.json", "/config.json"];
        ENDINGS.iter().find(|e| path.ends_with(*e))?;
        let found = self.beside.iter().find(|(e, _)| path.ends_with(e));
        Some(match found {
            Some((_, bytes)) => {
                let mut plan = Plan::empty(200);
                plan.body = bytes.clone();
                plan.head("content-length", bytes.len());
                plan.head("etag", "\"beside\"");
                plan.head("last-modified", "Sun, 01 Nov 2026 00:00:00 GMT");
                plan
            }
            None => Plan::empty(404),
        })
    }

    fn etag(&self) -> String {
        format!("\"generation-{}\"", self.generation)
    }

    /// Decides the answer, all at one moment: object, version and fault belong together.
    fn plan(&mut self, path: &str, headers: &HeaderMap) -> Plan {
        self.requests += 1;
        let size = self.object.len() as u64;
        let wanted = requested_range(headers);
        let clamp = |range: Range<u64>| range.start.min(size)..range.end.min(size);
        let request = Request {
            n: self.requests,
            path: path.to_owned(),
            headers: headers.clone(),
            range: clamp(wanted.clone().unwrap_or(0..size)),
        };
        let fault = (self.script)(&request);
        if let Some(Fault::Replace(object)) = &fault {
            self.replace(object.clone());
        }
        let size = self.object.len() as u64;
        let mut plan = self.honest(wanted, headers, &fault);
        match fault {
            Some(Fault::Status(status)) => plan = Plan::empty(status),
            Some(Fault::Busy {
                status,
                retry_after_secs,
            }) => {
                plan = Plan::empty(status);
                plan.head("retry-after", retry_after_secs);
            }
            Some(Fault::Hangup) => plan.end = End::Before,
            Some(Fault::Silence) => plan.end = End::Silence,
            Some(Fault::Reset { after }) => plan.cut(after, End::Reset),
            Some(Fault::Stall { after }) => plan.cut(after, End::Stall),
            Some(Fault::Short { missing }) => {
                plan.cut(plan.body.len().saturating_sub(missing), End::Close);
            }
            Some(Fault::Less { missing }) => {
                let (start, end) = (plan.start, plan.start + plan.body.len() as u64);
                let less = start..end.saturating_sub(missing).max(start + 1);
                plan = self.part(206, less, size);
            }
            Some(Fault::ContentRange(text)) => plan.head("content-range", text),
            Some(Fault::Flip { at }) => {
                let place = at.checked_sub(plan.start).map(|i| i as usize);
                if let Some(i) = place.filter(|&i| i < plan.body.len()) {
                    let mut body = plan.body.to_vec();
                    body[i] ^= 0x40;
                    plan.body = body.into();
                }
            }
            Some(Fault::Late(delay)) => plan.delay = delay,
            Some(Fault::Wait(gate)) => plan.gate = Some(gate),
            Some(Fault::IgnoreRange | Fault::Replace(_)) | None => {}
        }
        plan
    }

    fn honest(
        &self,
        wanted: Option<Range<u64>>,
        headers: &HeaderMap,
        fault: &Option<Fault>,
    ) -> Plan {
        let size = self.object.len() as u64;
        let etag = self.etag();
        let names = |name: &str| {
            let value = headers.get(name).and_then(|v| v.to_str().ok());
            value.map(|list| list == "*" || list.split(", ").any(|one| one == etag))
        };
        if !self.ignores_conditions {
            if names("if-match") == Some(false) {
                return Plan::empty(412);
            }
            if names("if-none-match") == Some(true) {
                let mut plan = Plan::empty(304);
                plan.head("etag", &etag);
                return plan;
            }
        }
        match wanted {
            Some(range) if !matches!(fault, Some(Fault::IgnoreRange)) => {
                if range.start >= size {
                    let mut plan = Plan::empty(416);
                    plan.head("content-range", format_args!("bytes */{size}"));
                    return plan;
                }
                self.part(206, range.start..range.end.min(size), size)
            }
            _ => self.part(200, 0..size, size),
        }
    }

    fn part(&self, status: u16, range: Range<u64>, size: u64) -> Plan {
        let mut plan = Plan::empty(status);
        plan.start = range.start;
        plan.body = self.object.slice(range.start as usize..range.end as usize);
        plan.head("content-length", plan.body.len());
        if status == 206 {
            let last = range.end - 1;
            plan.head(
                "content-range",
                format_args!("bytes {}-{last}/{size}", range.start),
            );
        }
        plan.head("etag", self.etag());
        plan.head("x-goog-generation", self.generation);
        plan.head("accept-ranges", "bytes");
        let second = self.generation % 60;
        plan.head(
            "last-modified",
            format_args!("Sun, 01 Nov 2026 00:00:{second:02} GMT"),
        );
        plan
    }
}

#[derive(PartialEq)]
enum End {
    /// The connection waits for the next request.
    Open,
    /// Closed before the answer.
    Before,
    /// Open, without an answer.
    Silence,
    Close,
    Reset,
    Stall,
}

/// One answer.
struct Plan {
    status: u16,
    headers: HeaderMap,
    /// Where in the object the body starts.
    start: u64,
    body: Bytes,
    delay: Duration,
    gate: Option<Gate>,
    end: End,
}

impl Plan {
    fn empty(status: u16) -> Self {
        let mut plan = Self {
            status,
            headers: HeaderMap::new(),
            start: 0,
            body: Bytes::new(),
            delay: Duration::ZERO,
            gate: None,
            end: End::Open,
        };
        if status != 304 {
            plan.head("content-length", 0);
        }
        plan
    }

    fn head(&mut self, name: &'static str, value: impl ToString) {
        let value = HeaderValue::try_from(value.to_string()).unwrap();
        self.headers.insert(HeaderName::from_static(name), value);
    }

    fn cut(&mut self, bytes: usize, end: End) {
        self.body.truncate(bytes);
        self.end = end;
    }
}

/// Answers one request after the other. An error is the client's leaving.
async fn connection(
    mut socket: TcpStream,
    shared: Arc<Mutex<Shared>>,
    wire: Wire,
) -> std::io::Result<()> {
    let mut buffer = Vec::new();
    while let Some((method, path, headers)) = read_head(&mut socket, &mut buffer).await? {
        let sibling = shared.lock().unwrap().sibling(&path);
        let log = if sibling.is_some() {
            &Wire::default()
        } else {
            &wire
        };
        let exchange = log.begin(Exchange::new(&method, &path, headers.clone()));
        let plan = sibling.unwrap_or_else(|| shared.lock().unwrap().plan(&path, &headers));
        if let Some(gate) = &plan.gate {
            gate.passed().await;
        }
        tokio::time::sleep(plan.delay).await;
        match plan.end {
            End::Before => return Ok(()),
            End::Silence => std::future::pending().await,
            _ => {}
        }
        {
            let mut exchange = exchange.lock().unwrap();
            exchange.status = plan.status;
            exchange.sent = plan.start..plan.start;
        }
        let mut head = format!("HTTP/1.1 {} As told\r\n", plan.status);
        for (name, value) in &plan.headers {
            head.push_str(&format!("{name}: {}\r\n", value.to_str().unwrap()));
        }
        head.push_str("\r\n");
        socket.write_all(head.as_bytes()).await?;
        if method != "HEAD" {
            for piece in plan.body.chunks(PIECE_BYTES) {
                socket.write_all(piece).await?;
                exchange.lock().unwrap().sent.end += piece.len() as u64;
            }
        }
        match plan.end {
            End::Reset => {
                socket.set_zero_linger()?;
                return Ok(());
            }
            End::Stall => std::future::pending().await,
            End::Close => return Ok(()),
            End::Open | End::Before | End::Silence => {}
        }
    }
    Ok(())
}

/// Method, path and headers of the next request, none of which has a body; none at the end.
async fn read_head(
    socket: &mut TcpStream,
    buffer: &mut Vec<u8>,
) -> std::io::Result<Option<(String, String, HeaderMap)>> {
    const END: &[u8] = b"\r\n\r\n";
    loop {
        if let Some(end) = buffer.windows(END.len()).position(|w| w == END) {
            let head: Vec<u8> = buffer.drain(..end + END.len()).collect();
            let head = String::from_utf8_lossy(&head);
            let mut lines = head.split("\r\n");
            let mut words = lines.next().unwrap_or_default().split(' ');
            let (method, path) = (words.next(), words.next());
            let headers = lines
                .filter_map(|line| line.split_once(": "))
                .map(|(name, value)| (name.parse::<HeaderName>().unwrap(), value.parse().unwrap()));
            return Ok(Some((
                method.unwrap_or_default().to_owned(),
                path.unwrap_or_default().to_owned(),
                headers.collect(),
            )));
        }
        if socket.read_buf(buffer).await? == 0 {
            return Ok(None);
        }
    }
}
