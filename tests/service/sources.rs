//! MODEL_PATH and DEVICE: which weights are used, and on what.

use crate::app::{App, binary};
use crate::stores::fault::ObjectServer;
use crate::stores::{draw, mnist_bytes, refusal, small, small_bytes, with};
use tempfile::TempDir;

async fn origin(app: &App) -> String {
    let models = app.client.models().await.unwrap().models;
    models[0].ready.as_ref().unwrap().origin.clone()
}

#[tokio::test]
async fn a_path_is_a_file_or_a_folder_that_holds_one() {
    for name in ["model.safetensors", "anything.safetensors"] {
        let folder = TempDir::new().unwrap();
        let file = folder.path().join(name);
        std::fs::copy(small(), &file).unwrap();
        for path in [&*file, folder.path()] {
            // The path comes first: the store, which is not there, is not asked.
            let env = [
                ("MODEL_PATH", path.to_str().unwrap()),
                ("MODEL_URI", "http://127.0.0.1:1/model.safetensors"),
            ];
            let app = App::start(&env);
            draw(&app, &small_bytes()).await;
            assert_eq!(origin(&app).await, "file");
        }
        let uri = format!("file://{}", folder.path().display());
        draw(&App::start(&[("MODEL_URI", uri)]), &small_bytes()).await;
    }
}

#[tokio::test]
async fn a_folder_with_several_weights_takes_the_usual_name_or_says_so() {
    let folder = TempDir::new().unwrap();
    std::fs::write(folder.path().join("a.safetensors"), mnist_bytes()).unwrap();
    std::fs::write(folder.path().join("b.safetensors"), mnist_bytes()).unwrap();
    let app = App::start(&[("MODEL_PATH", folder.path())]);
    let refusal = refusal(&app).await;
    assert_eq!((refusal.status, &*refusal.kind), (502, "weights-not-found"));
    std::fs::copy(small(), folder.path().join("model.safetensors")).unwrap();
    draw(&app, &small_bytes()).await;
}

#[tokio::test]
async fn an_empty_or_absent_folder_is_passed_over_and_the_log_says_so() {
    let server = ObjectServer::new(small_bytes()).await;
    let folder = TempDir::new().unwrap();
    for path in [folder.path().to_owned(), folder.path().join("absent")] {
        let path = path.to_str().unwrap();
        let app = App::start(&with(server.env(), &[("MODEL_PATH", path)]));
        draw(&app, &small_bytes()).await;
        assert_eq!(origin(&app).await, "store");
        app.logged(|l| l["severity"] == "WARNING" && l["message"].to_string().contains(path))
            .await;

        let app = App::start(&[("MODEL_PATH", path)]);
        draw(&app, &mnist_bytes()).await;
        assert_eq!(origin(&app).await, "built-in");
    }
}

#[cfg(not(feature = "cuda"))]
#[test]
fn a_device_that_was_not_built_in_is_said_at_start() {
    let output = binary().env("DEVICE", "cuda").output().unwrap();
    assert_eq!(output.status.code(), Some(64));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(
        text.contains("DEVICE") && text.contains("--features cuda"),
        "{text}"
    );
}
